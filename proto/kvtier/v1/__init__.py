"""Version 1 of the protocol: messages and stubs generated from the .proto files beside this one."""
