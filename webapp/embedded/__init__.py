"""What `sluicegate up` brings along where nothing else is configured: a Valkey and a demo model.

- `valkey`: a real Valkey server, persistent, in the data directory.
- `demo_model`: an HTTP server that speaks Ollama's protocol and is no language model.
- `supervisor`: keeps a set of commands running, and ends them in order.
- `runtime`: free ports and the file that tells other terminals what is running.
"""
