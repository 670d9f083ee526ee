"""clickhouse-connect's HTTP client without the queries that it sends first.

The client reads `system.settings` under the user's own profile, which may shorten the answer, and then does not send the
settings that are missing there. It also makes the server send headers while a query runs, so that no read ever times out.
`settings` has what is sent instead. Overrides a private method; read in clickhouse-connect 1.12
(`HttpClient._init_common_settings`).
"""

from clickhouse_connect.driver.httpclient import HttpClient
from clickhouse_connect.driver.query import TzSource


class QuietClient(HttpClient):
    """A client that sends only the queries that it is given."""

    def _init_common_settings(self, tz_source: TzSource) -> None:
        self.params.update({name: str(value) for name, value in self._ch_settings.items()})
