-- What is billed beside tokens has prices of its own, by unit (billing/pricing/extras.py): decimal texts in USD, or factors.
ALTER TABLE model_prices ADD COLUMN extras jsonb NOT NULL DEFAULT '{}'
    CHECK (jsonb_typeof(extras) = 'object');
