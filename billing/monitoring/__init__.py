"""What operators are told: the audit log, alerts, gauges."""
