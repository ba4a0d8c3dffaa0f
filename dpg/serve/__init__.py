"""The reward service: rewards of a whole batch for trainers that ask for one sample at a time. See docs/serve.md."""
