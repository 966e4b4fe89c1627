"""Turn raw text into token datasets: ``python -m prep.tokenize SRC... -o DIR``."""
