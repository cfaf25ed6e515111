"""How the heads of an operator gather values: masked products, or states from chunk to chunk; `forms` chooses."""
