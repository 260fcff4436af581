"""Make the first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "tasks",
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("keys", sa.Text(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("newest", sa.Integer(), nullable=False),
        sa.Column("num_numbers", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("position", name="pk_tasks"),
        sa.UniqueConstraint("id", name="uq_tasks_id"),
        sa.UniqueConstraint("owner", "name", name="uq_tasks_owner_name"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_tasks_owner_position", "tasks", ["owner", "position"])
    op.create_table(
        "versions",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("change", sa.Text(), nullable=False),
        sa.Column("num_demonstrations", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("labels", sa.Text()),
        sa.Column("num_tokens", sa.Integer()),
        sa.Column("num_shots", sa.Integer()),
        sa.Column("num_dropped", sa.Integer(), nullable=False),
        sa.Column("answers", sa.Text()),
        sa.Column("model", sa.Text()),
        sa.Column("problem", sa.Text()),
        sa.PrimaryKeyConstraint("task_id", "version", name="pk_versions"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_versions_task_id_tasks", ondelete="CASCADE"),
    )
    op.create_table(
        "demonstrations",
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("from_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("until_version", sa.Integer()),
        sa.Column("added_in", sa.Integer(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("columns", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "number", "from_version", name="pk_demonstrations"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_demonstrations_task_id_tasks", ondelete="CASCADE"),
    )
    op.create_table(
        "jobs",
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("num_rows", sa.Integer(), nullable=False),
        sa.Column("num_done", sa.Integer(), nullable=False),
        sa.Column("num_problems", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("finished_at", TIME),
        sa.Column("problem", sa.Text()),
        sa.Column("summary", sa.Text()),
        sa.PrimaryKeyConstraint("position", name="pk_jobs"),
        sa.UniqueConstraint("id", name="uq_jobs_id"),
        sa.ForeignKeyConstraint(
            ["task_id", "version"],
            ["versions.task_id", "versions.version"],
            name="fk_jobs_task_id_versions",
            ondelete="CASCADE",
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_owner_position", "jobs", ["owner", "position"])
    op.create_index("ix_jobs_task_id_version", "jobs", ["task_id", "version"])
    op.create_table(
        "job_rows",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("columns", sa.Text(), nullable=False),
        sa.Column("result", sa.Text()),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_job_rows"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_rows_job_id_jobs", ondelete="CASCADE"),
    )
    is_waiting = sa.text("result IS NULL")
    op.create_index(
        "ix_job_rows_waiting", "job_rows", ["job_id", "number"], sqlite_where=is_waiting, postgresql_where=is_waiting
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("task_id", sa.Text()),
        sa.Column("version", sa.Integer()),
        sa.Column("job_id", sa.Text()),
        sa.PrimaryKeyConstraint("owner", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_table(
        "api_keys",
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("hmac", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("revoked_at", TIME),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("rows_per_minute", sa.Integer()),
        sa.PrimaryKeyConstraint("position", name="pk_api_keys"),
        sa.UniqueConstraint("id", name="uq_api_keys_id"),
        sqlite_autoincrement=True,
    )
