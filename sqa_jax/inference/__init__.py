"""Inference: answers from a student by multiple-choice scoring or generated text.

- `answer`: questions → predictions (`make_answerer`, `answer_mode`).
- `likelihood`: multiple-choice scoring, `LikelihoodScorer`.
- `generate`: text generation with continuous batching, `Generator`.
- `decode_slots`: multi-turn decoding in one KV cache with chunked prefill, `DecodeSlots`.
- `prefix_cache`: prefill of the prefix that all prompts share.
- `features`: cached image features of a frozen vision encoder.
- `predictions`: resumable predictions on disk.
"""
