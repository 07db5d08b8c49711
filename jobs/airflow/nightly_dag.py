"""The nightly run as an Airflow DAG (Airflow 3): one task, which submits the same command line.

The worker needs `pip install batch-scorer`, the job file, and a connection `batch_scorer_ray` whose
host is the URL of the Ray dashboard and whose password is the cluster's token. Clearing a
failed task submits again; stopping it cancels the Ray job.
"""

from datetime import timedelta

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    dag_id="batch_scorer_nightly",
    schedule="17 4 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    # One run catches up on all that were missed.
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=23, minutes=30),
):
    BashOperator(
        task_id="nightly",
        bash_command=(
            "batch-scorer submit --tag {{ dag_run.run_after | ds_nodash }}"
            " -- nightly --config /opt/batch-scorer/nightly.yaml"
        ),
        # The token goes through the environment: Airflow masks it, and no process list shows it.
        env={
            "RAY_API_SERVER_ADDRESS": "{{ conn.batch_scorer_ray.host }}",
            "RAY_AUTH_TOKEN": "{{ conn.batch_scorer_ray.password }}",
        },
        append_env=True,
        retries=2,
        retry_delay=timedelta(minutes=5),
    )
