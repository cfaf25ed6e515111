"""transformers' auto classes, which know exported students once this is imported.

Then a folder needs no `trust_remote_code`: this package's own code loads it, and the code inside of it is not used.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.distill.models.exported_model import MODEL_TYPE, LayerswapConfig

__all__ = ["AutoConfig", "AutoModelForCausalLM"]

AutoConfig.register(MODEL_TYPE, LayerswapConfig)
