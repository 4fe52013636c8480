"""The routes of the gateway: shapes of requests and responses, server-sent events, tools."""
