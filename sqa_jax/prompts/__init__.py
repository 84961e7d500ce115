"""Prompts and targets: text formats, their tokenization, distillation recipes, and dialogues with tools.

formats         prompts and targets in ScienceQA's notation: `Format`, `Template`, `render_target`
encode          tokenization, the same for training and inference: `Encoder`, `Encoded`
recipes         training examples of a study's arms: `ARMS`, `examples`
tool_calls      tools and the calls parsed from a text: `ToolSpec`, `Call`, `parse_tool_reply`
tool_forms      the text around calls and results, by chat template: `dialogue_form`
tool_dialogue   tokenization of dialogues with tools: `Dialogue`
tool_traces     dialogues as training rows: `trace_rows`
"""
