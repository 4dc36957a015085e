"""The ``vlmkernels demo`` command: a small VLM learns to read handwritten numbers. Needs the extra ``demo``.

| module | purpose |
| --- | --- |
| ``run`` | run the whole demo |
| ``suite`` | run the demo on the benchmark shapes-and-digits |
| ``model`` | build the model and its processor |
| ``warmup`` | train with supervision before GRPO |
| ``images`` | measure the time spent on images |
| ``report`` | draw the curves and write the page of samples |
| ``zoom_run`` | run the demo with a tool |
| ``zoom_task`` | the pages, and the environment whose tool zooms |
| ``zoom_warmup`` | supervised training before it |
| ``zoom_page`` | write its page |
"""
