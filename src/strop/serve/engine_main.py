"""`python -m strop.serve.engine_main`: the server's engine, its budgets by the machine's plan."""

from strop.engine.process import main
from strop.plan.serving import settle

if __name__ == "__main__":
    main(settle)
