"""clickhouse-connect's HTTP client without the queries that it sends first, and connections that lead to the server alone.

The client reads `system.settings` under the user's own profile, which may shorten the answer, and then does not send the
settings that are missing there. It also makes the server send headers while a query runs, so that no read ever times out.
`settings` has what is sent instead. Overrides a private method; read in clickhouse-connect 1.12
(`HttpClient._init_common_settings`).
"""

from typing import Any

from clickhouse_connect.driver.httpclient import HttpClient
from clickhouse_connect.driver.httputil import get_pool_manager_options
from clickhouse_connect.driver.query import TzSource
from urllib3 import PoolManager


class QuietClient(HttpClient):
    """A client that sends only the queries that it is given."""

    def _init_common_settings(self, tz_source: TzSource) -> None:
        self.params.update({name: str(value) for name, value in self._ch_settings.items()})


class DirectPool(PoolManager):
    """Connections to the host that is asked for. No proxy of the environment's is used and no redirect followed: either would
    be sent the password and the query.
    """

    def __init__(self, ca_certificate: str | None) -> None:
        """`ca_certificate`: PEM file of the authority to trust; the system's authorities without it."""
        super().__init__(**get_pool_manager_options(ca_cert=ca_certificate))

    def urlopen(self, method: str, url: str, redirect: bool = True, **options: Any) -> Any:  # type: ignore[override]
        """As urllib3's, but that a redirect is the answer."""
        return super().urlopen(method, url, redirect=False, **options)
