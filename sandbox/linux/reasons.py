"""Why each system call of the allowlist is on it: for whoever audits the filter. A test holds both lists together.

Every other call fails. Left out on purpose, beside what `seccomp.py` judges by arguments: sockets, messages that pass
descriptors, bpf, perf, ptrace, another's memory, userfaultfd, keyrings, mounts and namespaces, modules and kexec,
clocks, System V and POSIX queues, splice/tee/vmsplice, file handles, fanotify and inotify (Landlock does not hide the
names that they report), priorities, signals with a payload, timers with a signal of one's choice, personality, and
devices (mknod).
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    "memory of one's own: the allocator, numpy, thread stacks. Locking is bounded by RLIMIT_MEMLOCK, which is 0": (
        "brk mmap munmap mremap mprotect madvise mincore msync mlock mlock2 munlock membarrier map_shadow_stack "
        "memfd_create"
    ),
    "files, judged by Landlock, by the file system's own rights, and in `ns` by what there is": (
        "access faccessat faccessat2 open openat openat2 creat close close_range stat lstat fstat newfstatat statx "
        "statfs fstatfs readlink readlinkat getdents getdents64 chdir fchdir getcwd mkdir mkdirat rmdir unlink "
        "unlinkat rename renameat renameat2 link linkat symlink symlinkat truncate ftruncate fallocate umask"
    ),
    "metadata, which Landlock does not judge: the file's owner and mode do. Not in tier `self`, where the owner may be "
    "us": ("chmod fchmod fchmodat fchmodat2 chown fchown fchownat lchown utime utimes futimesat utimensat"),
    "reading and writing what is open": (
        "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile copy_file_range fsync "
        "fdatasync sync_file_range readahead fadvise64 cachestat flock dup dup2 dup3 pipe pipe2"
    ),
    "stream pairs of one's own (no other socket can be made): asyncio and multiprocessing talk over them. Not sendmsg: "
    "it passes descriptors": ("recvmsg recvmmsg recvfrom shutdown getsockname getpeername getsockopt setsockopt"),
    "waiting": (
        "select pselect6 poll ppoll epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd "
        "eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime pause nanosleep "
        "futex futex_waitv restart_syscall"
    ),
    "clocks, to read only": "time gettimeofday times",
    "alarms to oneself; they bring SIGALRM only": "alarm getitimer setitimer",
    "handling signals": (
        "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack"
    ),
    "processes and threads of one's own: RLIMIT_NPROC counts them, and all die with the run. Executed programs keep "
    "the filter and every other wall": (
        "fork vfork execve execveat exit exit_group wait4 waitid set_tid_address set_robust_list "
        "get_robust_list rseq arch_prctl setpgid getpgid getpgrp setsid getsid"
    ),
    "taking another id: without capabilities only the one that one has": (
        "setuid setgid setreuid setregid setresuid setresgid"
    ),
    "asking about oneself and the machine": (
        "getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid capget uname sysinfo getcpu "
        "getrusage getrandom getpriority sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max "
        "sched_get_priority_min sched_yield"
    ),
    "limits: hard ones can only be lowered, and a second filter freezes RLIMIT_CPU": "getrlimit setrlimit",
    "Landlock itself: a session's branches confine themselves further; a rule can only take away": (
        "landlock_create_ruleset landlock_add_rule landlock_restrict_self"
    ),
}
"""Reason -> names."""
