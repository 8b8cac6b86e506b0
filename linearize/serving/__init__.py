"""An OpenAI-compatible HTTP endpoint over a compiled model, with continuous batching. The extra `linearize[serve]`."""
