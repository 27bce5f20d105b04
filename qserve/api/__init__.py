"""OpenAI's protocol over HTTP. Knows nothing below LLM: no engine, no device, no files."""
