"""Stand-ins for a GPU on the CPU: graphs that are recorded, a device that refuses to be read, parts that go wrong."""
