"""Tests of pg_exports against the sandbox's real servers. The folders mirror the package; fixtures are in `conftest`."""
