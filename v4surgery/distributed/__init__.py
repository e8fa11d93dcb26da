"""One run over several processes that torchrun started: nodes x GPUs, or CPUs.

Every rank runs the same verb on the same arguments. ``launch`` reads what torchrun says,
``session`` keeps ranks silent but one and ends all when one fails, ``team`` is how they exchange
tensors and plain data. ``loading`` and ``experts`` split a streamed forward; who writes which file
is in checkpoint.sharing. ``forecast`` says how long a forward takes.
"""
