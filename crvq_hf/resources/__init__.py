"""What a long run runs on: devices, processes, and a folder that survives them.

`device` chooses where and in which precision to compute, `memory` says how much of it is free, `distributed` lets
processes work as one, `workfolder` keeps what is finished on the disk, `settings` holds what is set in PyTorch off.
Nothing here knows what is computed.

Called by `tuning`, `pipeline`, `quantizer` and `commands`.
"""
