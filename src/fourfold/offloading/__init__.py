"""Packed experts in host memory or on disk, brought to the computing device one module ahead of their use.

Each layer's experts are needed while that layer runs only, and they are nearly all of a model's frozen
bytes. So they lie in pinned host memory as the ordinary parameters of their modules (everything that reads
or saves parameters finds them there), and two buffers on the device hold the module that computes and the
one that comes next:

- `order`      which module is used after which, learned from the passes themselves
- `schedule`   which module lies in which buffer, and when a buffer may be filled again; no tensors
- `engine`     copies and events: a stream of its own on CUDA, at once on a CPU
- `streamer`   the tensors of a module in host memory, and as views of a buffer
- `host`       pinned host memory, and how much there is
- `disk`       experts that stay in the files of their checkpoint
- `mapped`     such a file, mapped, and whether it is still the one that it was
- `read_ahead` the thread that reads from files into host memory
- `budget`     which modules stay on the device
- `api`        `offload` and `onload`

The kernels and their order are those of a model that is on the device, and so are the results, to the bit.
"""
