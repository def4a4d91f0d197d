-- Drop a hold after its settlement was committed: give the hold back, take the charge.
-- KEYS: 1 mirror  2 fill token  3 leases  4 call notes  then for each limiter: its window, its calls in flight
-- ARGV: 1 call  2 lease member  3 -charge, or '' when somebody else settled the call (then the mirror goes cold)
--       4 wallet  5 -charge in USD  6 key  7 user  8 arrived, unix ms  9 tokens reserved minus tokens used
--       then for each limiter: tokens/min
-- Returns 'released', or 'cold' when the mirror must be rebuilt from Postgres.
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[4])
for i = 1, (#KEYS - 4) / 2 do
    local window = KEYS[3 + 2 * i]
    redis.call('ZREM', KEYS[4 + 2 * i], ARGV[1])
    local tat = ARGV[9] ~= '0' and redis.call('HGET', window, 'tokens')
    if tat then
        redis.call('HSET', window, 'tokens', string.format('%.0f', tat - ARGV[9] * 60000000 / ARGV[9 + i]))
    end
end
local hold, usd = 'hold:' .. ARGV[1], 'usd:' .. ARGV[1]
local state = redis.call('HMGET', KEYS[1], hold, usd, 'capped')
if not state[1] or ARGV[3] == '' or (state[3] and not state[2]) then
    redis.call('DEL', KEYS[1], KEYS[2])
    return 'cold'
end
redis.call('HINCRBY', KEYS[1], 'available:' .. ARGV[4], state[1])
redis.call('HINCRBY', KEYS[1], 'available:' .. ARGV[4], ARGV[3])
if state[3] then
    for _, cap in ipairs(find_caps(KEYS[1], ARGV[4], ARGV[6], ARGV[7], tonumber(ARGV[8]))) do
        if cap.period ~= 'call' then
            redis.call('HINCRBY', KEYS[1], cap.field, cap.usd and state[2] or state[1])
            redis.call('HINCRBY', KEYS[1], cap.field, cap.usd and ARGV[5] or ARGV[3])
        end
    end
end
redis.call('HDEL', KEYS[1], hold, usd)
return 'released'
