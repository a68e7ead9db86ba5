"""One LLM, many LoRA experts, one Ray service: the model picks its adapters token by token."""

__version__ = "0.1.0"
