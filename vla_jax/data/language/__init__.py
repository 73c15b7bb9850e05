"""Instructions, captions and tokenizers."""
