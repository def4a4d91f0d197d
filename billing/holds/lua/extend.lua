-- Enlarge a hold by an amount, if the wallet and every cap have it.
-- KEYS: 1 mirror
-- ARGV: 1 call  2 more  3 -more  4 wallet  5 more USD  6 -more USD  7 key  8 user  9 arrived, unix ms
-- Returns 'extended', 'insufficient_funds', 'cap_exceeded', 'wallet_frozen', or 'missing' when Redis has lost the hold,
-- or has a mirror of another lineage only, which is dropped.
local available, hold, usd = 'available:' .. ARGV[4], 'hold:' .. ARGV[1], 'usd:' .. ARGV[1]
local state = redis.call('HMGET', KEYS[1], available, 'frozen:' .. ARGV[4], hold, 'capped', usd, 'lineage')
if state[1] and state[6] ~= lineage() then
    redis.call('DEL', KEYS[1])
    return 'missing'
end
if not state[1] or not state[3] then return 'missing' end
if state[2] then return 'wallet_frozen' end
if redis.call('HINCRBY', KEYS[1], available, ARGV[3]) < 0 then
    redis.call('HINCRBY', KEYS[1], available, ARGV[2])
    return 'insufficient_funds'
end
if state[4] then
    local caps = find_caps(KEYS[1], ARGV[4], ARGV[7], ARGV[8], tonumber(ARGV[9]))
    if take_caps(KEYS[1], caps, ARGV[3], ARGV[6], ARGV[2], ARGV[5], state[3], state[5] or '0') then
        redis.call('HINCRBY', KEYS[1], available, ARGV[2])
        return 'cap_exceeded'
    end
    redis.call('HINCRBY', KEYS[1], usd, ARGV[5])
end
redis.call('HINCRBY', KEYS[1], hold, ARGV[2])
return 'extended'
