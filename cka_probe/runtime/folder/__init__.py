"""The folder of a run: who may write into it, what the tool wrote there, and files that appear together."""
