-- Writes the deadline of a claim's key again, so that the connection has a write to wait for.
-- ARGV: the claim id, the state that it has left; a renewal may be confirmed when the claim is done.
local head = redis.call('GETRANGE', KEYS[1], 2, 19)
local state = head:sub(1, 1)
if head:sub(3) ~= ARGV[1] or not (state == ARGV[2] or state == 'D' and ARGV[2] == 'R') then return 0 end
local ttl = redis.call('PTTL', KEYS[1])
if ttl > 0 then redis.call('PEXPIRE', KEYS[1], ttl) end
return 1
