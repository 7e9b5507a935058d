"""Models to and from Hugging Face: what `config.json` says, what the tensors are called, safetensors files."""
