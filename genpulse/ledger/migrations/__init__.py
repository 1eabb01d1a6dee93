"""Steps from one version of the tables to the next, run by :meth:`genpulse.ledger.Ledger.migrate`."""
