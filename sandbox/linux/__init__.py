"""What the sandbox asks of the Linux kernel: system calls by ctypes, Landlock, seccomp, mounts."""
