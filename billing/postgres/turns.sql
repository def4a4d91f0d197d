-- What one process among all does now and then.

-- Claim a turn at what one process among all does now and then, by moving the time of the last. False: it is not time yet.
CREATE OR REPLACE FUNCTION take_turn(p_name text, p_period interval) RETURNS boolean LANGUAGE sql AS $$
    WITH taken AS (
        INSERT INTO routine_turns (name, taken_at) VALUES (p_name, now())
        ON CONFLICT (name) DO UPDATE SET taken_at = now() WHERE routine_turns.taken_at <= now() - p_period
        RETURNING 1
    )
    SELECT EXISTS (SELECT 1 FROM taken)
$$;
