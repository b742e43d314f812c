"""The ssh mesh: nodes that see of each other nothing but one ssh port talk Ray through it, on loopback addresses of their own."""
