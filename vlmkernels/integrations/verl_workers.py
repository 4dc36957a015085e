"""Calls ``patch_verl()`` on import, for verl's workers: set ``VERL_USE_EXTERNAL_MODULES`` to this module.

``vlmkernels.integrations.patch.Patch.active["patch_verl"].undo()`` undoes it.
"""

from vlmkernels.integrations.verl import patch_verl

patch_verl()
