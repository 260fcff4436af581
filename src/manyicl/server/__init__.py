"""The task server: requests in, calls of an engine out. `docs/server.md` explains it."""
