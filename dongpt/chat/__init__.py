"""Conversations: reading dialogues, prompting a model with them."""
