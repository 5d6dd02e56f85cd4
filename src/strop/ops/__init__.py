"""The only functions a model may call for heavy work. One folder per operation, the same files in each."""
