"""Results as text and figures for people.

- `tables`: `comparison` of systems on the same questions; `text_table` aligns cells or writes Markdown.
- `format`: numbers as text. `plot_style`: figures as SVG.
- `model_card`: the card of an exported model.
"""
