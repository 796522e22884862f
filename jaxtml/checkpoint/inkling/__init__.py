"""The format of released Inkling checkpoints: `config.json`, safetensors, quantised experts."""
