-- Calls that the provider refuses with words about our account, though not all are: when the last of several in a row was, and its words.
ALTER TABLE provider_quota ADD COLUMN refused_at timestamptz, ADD COLUMN refused_reason text;

-- A reconciliation names the provider's records that did not answer: key, credits, activity, bills.
ALTER TABLE reconciliation_runs ADD COLUMN away text[] NOT NULL DEFAULT '{}';
