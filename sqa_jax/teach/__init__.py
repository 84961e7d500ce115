"""Collecting a teacher's replies: prompts, API clients, an append-only ledger of costs, retries, budget and batch jobs.

collect     `teach`: the verb's work, from configuration to records.jsonl
teacher     `Request`, `Reply`, the protocols `RemoteTeacher` and `LocalTeacher`, and the two kinds of error
gemini, genai, openai_compatible, student, replay    one teacher each
run, batch  concurrent requests with rate limit and backoff; batch jobs
ledger, budget, replies    what was sent, what it cost, and what came back
"""
