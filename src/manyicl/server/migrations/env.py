"""Run by Alembic: it migrates over the connection, and in the transaction, of `Database.open`."""

from alembic import context

from manyicl.server.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite changes a table by making it anew
)
context.run_migrations()
