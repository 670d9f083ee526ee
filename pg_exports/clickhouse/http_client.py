"""clickhouse-connect's HTTP client, without the questions that it asks the server first.

The client would read `system.settings` under the user's own profile, which may shorten the answer, and then leave out each
setting that it has not seen; and it would have the server send headers as long as a query works, so that no read times out.
`settings` says what is sent instead. Read in clickhouse-connect 1.12 (`HttpClient._init_common_settings`).
"""

from clickhouse_connect.driver.httpclient import HttpClient
from clickhouse_connect.driver.query import TzSource


class QuietClient(HttpClient):
    """A client that sends what it is told to, and nothing before it."""

    def _init_common_settings(self, tz_source: TzSource) -> None:
        self.params.update({name: str(value) for name, value in self._ch_settings.items()})
