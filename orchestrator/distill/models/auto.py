"""transformers' auto classes, which know exported students and the classes of installed families once this is imported.

Then a folder needs no `trust_remote_code`: this package's own code loads it, and the code inside of it is not used.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.distill.models.exported_model import MODEL_TYPE, LayerswapConfig
from orchestrator.distill.models.families import families

__all__ = ["AutoConfig", "AutoModelForCausalLM"]

AutoConfig.register(MODEL_TYPE, LayerswapConfig)
families()  # modules of installed packages, which register classes of their own
