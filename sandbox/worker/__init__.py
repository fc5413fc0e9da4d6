"""The warm unit: warden, zygote and the children that run code. Nothing here talks to clients."""
