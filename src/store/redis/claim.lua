-- SET NX GET for servers before 7.0. ARGV: the claim running, its lifetime in ms.
local there = redis.call('GET', KEYS[1])
if not there then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return there
