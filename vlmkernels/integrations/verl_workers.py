"""``patch_verl()`` on import: what VERL_USE_EXTERNAL_MODULES of verl's workers names."""

from vlmkernels.integrations.verl import patch_verl

patch_verl()
