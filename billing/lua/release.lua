-- Drop a hold after its settlement was committed: give the hold back, take the charge.
-- KEYS: 1 mirror  2 fill token  3 leases  4 call notes  5 key calls in flight  6 key window
-- ARGV: 1 call  2 lease member  3 -charge, or '' when somebody else settled the call (then the mirror goes cold)
--       4 tokens/min  5 tokens reserved minus tokens used
-- Returns 'released', or 'cold' when the mirror must be rebuilt from Postgres.
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[4])
redis.call('ZREM', KEYS[5], ARGV[1])
if ARGV[5] ~= '0' then
    local tat = redis.call('HGET', KEYS[6], 'tokens')
    if tat then
        redis.call('HSET', KEYS[6], 'tokens', string.format('%.0f', tat - ARGV[5] * 60000000 / ARGV[4]))
    end
end
local hold = redis.call('HGET', KEYS[1], 'hold:' .. ARGV[1])
if not hold or ARGV[3] == '' then
    redis.call('DEL', KEYS[1], KEYS[2])
    return 'cold'
end
redis.call('HINCRBY', KEYS[1], 'available', hold)
redis.call('HINCRBY', KEYS[1], 'available', ARGV[3])
redis.call('HDEL', KEYS[1], 'hold:' .. ARGV[1])
return 'released'
