"""Sockets between hub, engines and kernels: who may call, how bytes are framed and sealed."""
