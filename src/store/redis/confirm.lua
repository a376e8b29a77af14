-- Writes the deadline of a claim's key again, so that the connection has a write to wait for.
-- ARGV: the claim id, the state that it has left.
local head = redis.call('GETRANGE', KEYS[1], 2, 19)
if head:sub(1, 1) ~= ARGV[2] or head:sub(3) ~= ARGV[1] then return 0 end
local ttl = redis.call('PTTL', KEYS[1])
if ttl > 0 then redis.call('PEXPIRE', KEYS[1], ttl) end
return 1
