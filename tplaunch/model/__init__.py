"""The transformer: one decoder-only model, whose fields make it Llama, Mistral, Qwen or GPT-2."""
