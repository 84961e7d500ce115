"""Evaluation: questions answered by a student with its adapter, and the answers scored.

`student.open_student` loads a trained run or a bare student, `evaluate.answer_and_score` keeps predictions and metrics on
disk whoever answers (`sqa_jax.agent` does, too), and `evaluate.evaluate` is what the verb `sqa_jax.evaluate` calls.
"""
