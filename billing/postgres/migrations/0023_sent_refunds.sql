-- A refund of ours was given to a provider that cannot be asked twice: whatever became of that, it is not sent again by itself.
ALTER TABLE payment_reversals ADD COLUMN sent_at timestamptz;
